"""Predicting how AV1 divides 16x16 blocks.

Data, models, training and evaluation of the codec experiment.
"""
