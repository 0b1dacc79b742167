"""``python -m perennial``."""

from perennial.cli import app

app(prog_name="perennial")
