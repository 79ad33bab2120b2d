"""Models in Python: ``model.py`` with a class ``Model``.

::

    class Model:
        inputs = [("text", "BYTES", [1])]       # name, V2 datatype, shape without the batch dimension (-1: any size)
        outputs = [("length", "INT32", [1])]
        max_batch_size = 64                     # 0: no batch dimension, shapes are whole; left out: as configured

        def load(self, context):                # optional; may take long, may raise
            ...

        def execute(self, inputs):              # {name: array of rows} -> {name: array of as many rows}
            lengths = [[len(row[0])] for row in inputs["text"]]
            return {"length": np.array(lengths, dtype=np.int32)}

        def close(self):                        # optional
            ...

``inputs`` and ``outputs`` may hold ``aiorch_server.types.TensorSpec`` instead of tuples, or be left to the model's
configuration; ``signature()`` may give a whole ``ModelSignature`` instead. ``__init__`` takes no arguments and must be
quick: it also runs when the file is only inspected. ``context`` is the ``LoadContext``. Each instance imports the file
anew under a name of its own, so neither two models nor two instances share module variables; files beside ``model.py``
are reached by relative imports (``from . import vocabulary``).

A model may ask other models of the server: keep ``context`` in ``load``, then ``aiorch_backends.python.calling.call``
(or ``call_async`` in coroutines) takes and gives arrays; ``context.call_model`` itself gives the answers of decoupled
models one by one. A call ends with the caller's request, at its own timeout, and, where a model would wait for itself,
at once.

BYTES tensors are ``object`` arrays of ``bytes`` (outputs may hold ``str``, sent as UTF-8), BF16 tensors are ``uint16``
bit patterns. Input arrays may not be kept beyond the call. What ``execute`` raises fails the batch with INTERNAL, and
the client sees its type and first line; an ``aiorch_server.errors.AiorchError`` (such as ``RequestError``) keeps its
own code.
"""

from aiorch_backends.python.backend import PythonBackend

__all__ = ["PythonBackend"]
