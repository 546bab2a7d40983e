"""The common parts of all packages: errors, configuration, options, devices, files and pictures."""

__version__ = "0.1.0"  # read by pyproject.toml and --version; also change CITATION.cff and CHANGELOG.md
