"""Outputs that are sent from where the model left them; see loans.pxd for the contract."""

from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.stdlib cimport free, malloc

from aiorch_server._core.buffers cimport drop_buffer, hold_buffer

cdef extern from * nogil:
    """
    #include <pthread.h>

    static pthread_mutex_t aiorch_loans_lock = PTHREAD_MUTEX_INITIALIZER;
    static inline void aiorch_lock_loans(void) { pthread_mutex_lock(&aiorch_loans_lock); }
    static inline void aiorch_unlock_loans(void) { pthread_mutex_unlock(&aiorch_loans_lock); }
    static inline int aiorch_count_loans(int *count, int by) { return __atomic_add_fetch(count, by, __ATOMIC_ACQ_REL); }
    """
    void aiorch_lock_loans()
    void aiorch_unlock_loans()
    int aiorch_count_loans(int *count, int by)

# guarded by the lock
cdef Loan *_given_back = NULL
cdef size_t _lent_bytes = 0


cdef Loan *new_loan(object lender, size_t size) except NULL:
    global _lent_bytes
    cdef Loan *loan = <Loan *> malloc(sizeof(Loan))
    if loan == NULL:
        raise MemoryError
    Py_INCREF(lender)
    loan.references, loan.size, loan.object, loan.buffer, loan.next = 1, size, <void *> lender, NULL, NULL
    aiorch_lock_loans()
    _lent_bytes += size
    aiorch_unlock_loans()
    return loan


cdef Loan *lend_buffer(uint8_t *buffer, size_t size) noexcept nogil:
    global _lent_bytes
    cdef Loan *loan = <Loan *> malloc(sizeof(Loan))
    if loan == NULL:
        return NULL
    hold_buffer(buffer)
    loan.references, loan.size, loan.object, loan.buffer, loan.next = 1, size, NULL, buffer, NULL
    aiorch_lock_loans()
    _lent_bytes += size
    aiorch_unlock_loans()
    return loan


cdef void return_loans():
    global _given_back
    cdef Loan *loan
    cdef Loan *following
    aiorch_lock_loans()
    loan, _given_back = _given_back, NULL
    aiorch_unlock_loans()
    while loan != NULL:
        following = loan.next
        forget(loan)
        loan = following


cdef void forget(Loan *loan):
    global _lent_bytes
    aiorch_lock_loans()
    _lent_bytes -= loan.size
    aiorch_unlock_loans()
    Py_DECREF(<object> loan.object)
    free(loan)


cdef bint may_lend(size_t size) noexcept nogil:
    cdef bint is_allowed
    aiorch_lock_loans()
    is_allowed = _lent_bytes + size <= MAX_LENT_BYTES
    aiorch_unlock_loans()
    return is_allowed


cdef void hold_loan(Loan *loan) noexcept nogil:
    aiorch_count_loans(&loan.references, 1)


cdef void drop_loan(Loan *loan) noexcept nogil:
    global _given_back, _lent_bytes
    if aiorch_count_loans(&loan.references, -1) > 0:
        return
    aiorch_lock_loans()
    if loan.object != NULL:
        loan.next = _given_back
        _given_back = loan
        loan = NULL
    else:
        _lent_bytes -= loan.size
    aiorch_unlock_loans()
    if loan != NULL:
        drop_buffer(loan.buffer)
        free(loan)


cdef LentList *new_lent_list(int n) noexcept nogil:
    cdef LentList *lent = <LentList *> malloc(sizeof(LentList) + <size_t> n * sizeof(Lent))
    if lent != NULL:
        lent.n, lent.size = 0, 0
    return lent


cdef void drop_lent_list(LentList *lent) noexcept nogil:
    if lent == NULL:
        return
    for i in range(lent.n):
        drop_loan(lent.items[i].loan)
    free(lent)


def read_lent_bytes():
    """Bytes of arrays that are lent to answers, or given back and not yet let go of."""
    cdef size_t size
    aiorch_lock_loans()
    size = _lent_bytes
    aiorch_unlock_loans()
    return size


def return_all():
    """Lets go of everything that was given back."""
    return_loans()
