"""Training: configurations for timm's script, detectors, segmenters, their data sets, and a study."""
