"""`python -m sbora_diffusion` is `sbora-diffusion`."""

from sbora_diffusion.cli.app import main

main()
