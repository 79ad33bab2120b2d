# Nothing here is visible from Python: see answers.pxd.
