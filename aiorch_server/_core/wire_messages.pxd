# Requests, responses and parameters as bytes, for Python callers; with the interpreter lock.

from libc.stdint cimport uint8_t


# A length-delimited field; `tag` is its number and kind, in one byte.
cdef bytes encode_field(uint8_t tag, object content)
