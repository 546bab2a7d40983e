"""What all packages share: errors, configuration, options, devices, files and pictures."""

__version__ = "0.1.0"  # of the project: pyproject.toml and --version read it here; see also CITATION.cff, CHANGELOG.md
