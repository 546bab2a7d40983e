"""What all packages share: errors, configuration, options, devices, files and pictures."""
