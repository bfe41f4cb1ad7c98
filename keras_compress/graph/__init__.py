"""The graph of a model: traced from any Keras model, walked, rebuilt into a new model."""
