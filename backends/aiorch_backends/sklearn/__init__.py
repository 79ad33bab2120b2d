"""scikit-learn estimators: ``model.skops``, and where pickles are allowed ``model.joblib`` or ``model.pkl``.

One input ``input``, FP64 ``[n_features_in_]`` (FP32 where declared; a text pipeline declares TYPE_STRING ``[1]``).
Outputs: classifiers give ``label`` and, if they can, ``probabilities``; all others give ``prediction``. All batch.
Parameter: ``trusted_types``, a comma-separated list of types that a skops file may hold beyond skops' own list.
"""

from aiorch_backends.sklearn.backend import SklearnBackend

__all__ = ["SklearnBackend"]
