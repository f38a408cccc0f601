"""birthmark.toml, parsed once."""

from provisioning.config.reader import FILE, check_modes, duration, load, parse
from provisioning.config.sections import Config, Listener
from provisioning.config.template import default_toml

__all__ = [
    "FILE",
    "Config",
    "Listener",
    "check_modes",
    "default_toml",
    "duration",
    "load",
    "parse",
]
