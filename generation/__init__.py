"""What sampler.py and eesampler.py share: their options, the run over all samples, the report."""
