"""`python -m lambda_vit`, and `torchrun -m lambda_vit`."""

from .cli import main

main()
