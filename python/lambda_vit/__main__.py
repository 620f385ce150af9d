"""`python -m lambda_vit`, and `torchrun -m lambda_vit`."""

from __future__ import annotations

from .cli.main import main

main()
