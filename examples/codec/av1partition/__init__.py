"""Predicting how AV1 divides 16x16 blocks: data, models, training and evaluation of the codec experiment."""
