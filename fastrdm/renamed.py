"""Names of settings, values and commands that are called otherwise now. No torch."""

RENAMED = {
    "instruments": "analysis",
    "grey": "grayscale",
    "solarise": "solarize",
    "solarise_threshold": "solarize_threshold",
    "centre_sharpen": "center_sharpen",
    "ladder": "newton_schulz",
    "even": "gram_power",
    "eigh64": "eigh",
    "theory": "analyze",
}
"""Old name to new name: whoever refuses an old one says what it is called now."""
