"""``python -m mlx_fusekit``."""

from mlx_fusekit.cli import main

main()
