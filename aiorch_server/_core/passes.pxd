# Who may call which model, as the Python plane has decided before: what lets the compiled door pass a call without it.
#
# Only what was allowed is kept, until it expires or clear() is called; whatever is not found is declined, and Python
# decides (again). A pass is for one credential and one model name, and carries the quota that counts for it.
#
# What a credential is: the value of the one `authorization` header, verbatim; or, without that header, the certificate
# that the connection's handshake has proved, in DER. The two never meet: certificates are public, so who sends one's
# bytes as a header must not pass for its owner.
#
# Comparing. Attackers choose what is looked up and see how long that takes. The slot is found by SipHash-2-4 under a
# random key over all bytes, and stored bytes are compared only where all 64 bits of it agree; without the key nobody can
# make that happen with bytes that are partly right, so memcmp's time tells nothing. A hit always compares all bytes.
# The connection's last hit is compared without a hash, but in a time that depends on sizes alone: behind a proxy others
# may use the same connection.
#
# Ownership: counted references. A PassTable: the Passes object's and one for each Group. A Pass: the table's, and one for
# each connection whose last hit it is; it keeps one of its quota. What is thrown out of the table while a connection
# remembers it is dead at once (`is_live`), and freed with that connection's next call or end; its secret is wiped then.
# Bounds: `max_entries` and `max_bytes` hold for the table; the oldest passes go first.
# Threads: any. A lookup holds `lock` for one walk along a short chain, never with a hash to compute.

from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint8_t, uint64_t

from aiorch_server._core.quota cimport QuotaState
from aiorch_server._core.request cimport pthread_mutex_t
from aiorch_server._core.wire cimport Slice


cdef enum CredentialKind:
    CREDENTIAL_NONE = 0         # nothing that a pass could be for: no header and no certificate, or several headers
    CREDENTIAL_HEADER = 1
    CREDENTIAL_CERTIFICATE = 2


cdef struct Pass:               # immutable, but for what is said to be atomic
    int references              # atomic
    int is_live                 # atomic: 0 once it was replaced, thrown out or cleared
    uint64_t hash
    CredentialKind kind
    Slice credential            # both lie behind the record
    Slice model
    int64_t expires_ns          # CLOCK_MONOTONIC
    QuotaState *quota           # a reference; NULL: nothing is counted
    uint64_t tenant             # as queues know it; 0: none
    double weight
    # the table's, under its lock
    Pass *next                  # in the chain of its slot
    Pass *older
    Pass *newer


cdef struct PassTable:
    int references
    uint64_t key[2]             # random, constant
    size_t max_entries
    size_t max_bytes
    pthread_mutex_t lock        # guards the rest
    Pass **slots                # owned; a power of two
    size_t n_slots
    size_t n_entries
    size_t n_bytes
    Pass *oldest
    Pass *newest
    uint64_t generation         # how often it was cleared
    uint64_t evicted


# What a call shows, and where its connection remembers its last hit. Borrowed for one lookup; the connection's thread.
cdef struct Claim:
    PassTable *table
    CredentialKind kind
    Slice credential
    Pass **last                 # owns a reference, or points to NULL


cdef void retain_passes(PassTable *table) noexcept nogil
cdef void release_passes(PassTable *table) noexcept nogil
cdef void release_pass(Pass *found) noexcept nogil
# The pass that lets this call through to that model, now; NULL: ask Python. It lives until the claim's `last` changes.
cdef const Pass *find_pass(const Claim *claim, const Slice *model, int64_t now_ns) noexcept nogil
# Whether the claim is that of the last hit, for whatever model: somebody who was let through before.
cdef bint is_known(const Claim *claim, int64_t now_ns) noexcept nogil


cdef class Passes:
    cdef PassTable *table
