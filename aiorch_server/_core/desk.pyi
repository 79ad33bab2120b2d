# Nothing here is visible from Python: see desk.pxd.
