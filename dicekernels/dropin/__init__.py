"""Drop-in replacements, one module for each library: ``from dicekernels.dropin.monai import DiceLoss``."""
