"""Looking inside an update: spectra, overlaps, similarities."""
