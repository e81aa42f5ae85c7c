"""Fast inference: fuses, compiles, quantizes and exports models, and measures them against timm's own."""
