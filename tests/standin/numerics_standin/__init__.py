"""A stand-in accelerator: PyTorch's Python backend for PrivateUse1, with CPU memory behind its tensors.

It exists so that code for accelerators can be tested on a machine without one. Importing torch with this folder's
parent on PYTHONPATH registers the device `standin` (through a `torch.backends` entry point); child processes inherit
it. Nothing here is fast, and nothing here is shipped.
"""

from __future__ import annotations


def autoload() -> None:
    """Register the backend; torch calls this at the end of its own import."""
    from numerics_standin import registration

    registration.register()
