"""tml_core: the open runtime for interaction models."""

import torch as _torch  # noqa: F401  (its libgomp must be the one we share)
