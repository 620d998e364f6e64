"""Files and generators to tensors. No models here."""
