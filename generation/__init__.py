"""The common parts of sampler.py and eesampler.py: settings, stages, the sample folder, the report."""
