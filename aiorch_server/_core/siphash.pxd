# SipHash-2-4 with a key of 128 bits and a result of 64: https://www.aumasson.jp/siphash/siphash.pdf. For tables whose
# keys strangers choose: without the key nobody can find two inputs that collide, nor learn from times what is stored.

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memcpy


cdef inline uint64_t rotate(uint64_t value, int bits) noexcept nogil:
    return value << bits | value >> (64 - bits)


cdef inline void mix(uint64_t *v) noexcept nogil:
    v[0] += v[1]
    v[2] += v[3]
    v[1] = rotate(v[1], 13) ^ v[0]
    v[3] = rotate(v[3], 16) ^ v[2]
    v[0] = rotate(v[0], 32)
    v[2] += v[1]
    v[0] += v[3]
    v[1] = rotate(v[1], 17) ^ v[2]
    v[3] = rotate(v[3], 21) ^ v[0]
    v[2] = rotate(v[2], 32)


cdef inline uint64_t siphash(uint64_t k0, uint64_t k1, const uint8_t *data, size_t size) noexcept nogil:
    """As on machines with the low byte first: results are never stored."""
    cdef uint64_t v[4]
    cdef uint64_t word
    cdef size_t at = 0
    v[0], v[1] = k0 ^ 0x736F6D6570736575ULL, k1 ^ 0x646F72616E646F6DULL
    v[2], v[3] = k0 ^ 0x6C7967656E657261ULL, k1 ^ 0x7465646279746573ULL
    while at + 8 <= size:
        memcpy(&word, data + at, 8)
        v[3] ^= word
        mix(v)
        mix(v)
        v[0] ^= word
        at += 8
    word = 0
    memcpy(&word, data + at, size - at)
    word |= <uint64_t> size << 56
    v[3] ^= word
    mix(v)
    mix(v)
    v[0] ^= word
    v[2] ^= 0xFF
    for _ in range(4):
        mix(v)
    return v[0] ^ v[1] ^ v[2] ^ v[3]
