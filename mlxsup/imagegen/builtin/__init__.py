"""The small text-to-picture model that ships with the package: emoji, learnt by heart, 64 x 64."""
