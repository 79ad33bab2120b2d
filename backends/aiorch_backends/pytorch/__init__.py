"""PyTorch models: ``model.pt2`` (torch.export) needs no configuration, ``model.pt`` (TorchScript) needs one.

Inputs go by the names of ``forward``'s arguments or by Triton's ``INPUT__<i>``; outputs by ``OUTPUT__<i>``, by the keys
of the dictionary that ``forward`` returns, or (TorchScript) in the order declared. Parameter: ``require_gpu``.
"""

from aiorch_backends.pytorch.backend import PyTorchBackend

__all__ = ["PyTorchBackend"]
