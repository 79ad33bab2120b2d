# Nothing here is visible from Python: see h2.pxd.
