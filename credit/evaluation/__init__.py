"""What a trained model gives: forecasts, their scores and spectra, series at a place, pictures, and its weights."""
