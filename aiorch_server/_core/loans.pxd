# Outputs that are sent from where the model left them: an answer holds a loan on the array instead of a copy of it.
#
# A loan is taken with the interpreter lock and given back without: the last one who gives it back only puts it into a
# list, which whoever has the lock empties next (each batch does, before it takes another). So an idle server may keep
# arrays that nobody needs; may_lend bounds how much is lent or kept, and above that answers are copied as ever.

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t


cdef enum:
    LENT_FROM_BYTES = 32768         # below, a copy costs less than the detour
    MAX_LENT_BYTES = 67108864


cdef struct Loan:
    int references
    size_t size
    void *object                    # a Python object, one reference; or NULL:
    uint8_t *buffer                 # a buffer, one reference
    Loan *next                      # once it is given back


cdef struct Lent:                   # one piece of an answer
    size_t at                       # it comes before this byte of the answer's own
    const uint8_t *data
    size_t size
    Loan *loan                      # one reference


cdef struct LentList:               # what an answer has on loan, in order; malloc'd
    int n
    size_t size                     # of all pieces
    Lent items[1]                   # n of them


# With the interpreter lock: a loan with one reference. MemoryError.
cdef Loan *new_loan(object lender, size_t size) except NULL
# With the interpreter lock: lets go of what has been given back.
cdef void return_loans()
# Without it: bytes within a buffer, of which the loan takes a reference; it is let go of at once. NULL: no memory.
cdef Loan *lend_buffer(uint8_t *buffer, size_t size) noexcept nogil
cdef bint may_lend(size_t size) noexcept nogil
cdef void hold_loan(Loan *loan) noexcept nogil
cdef void drop_loan(Loan *loan) noexcept nogil
# Room for `n` pieces; NULL: no memory.
cdef LentList *new_lent_list(int n) noexcept nogil
# Frees the list with its references; NULL: nothing happens.
cdef void drop_lent_list(LentList *lent) noexcept nogil
