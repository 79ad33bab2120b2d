# Nothing here is visible from Python: see h2_landing.pxd.
