"""Alignment of FLUX.1 image models by GRPO. Importing the package itself imports nothing: see cli.py."""
