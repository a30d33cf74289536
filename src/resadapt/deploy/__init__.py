"""Taking a trained model where it is used."""
