# Only cdef functions: nothing of this module is visible from Python.
