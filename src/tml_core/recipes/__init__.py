"""From data to weights in one command: the recipes that bundled models are made with.

A recipe is a file of stages as `tml-core train` takes it, with the datasets it needs beside them::

    [[dataset]]
    name = "listen"            # data/listen, as a stage's data.path says it
    tasks = ["transcribe"]     # see tml_core.data; all by default
    split = "train"
    seed = 1
    hours = 20.0               # or num = 400, interactions

`make` writes the start, the datasets and the run into one folder, each of which goes on where it
was interrupted.
"""

from tml_core.recipes.making import export_model, make
from tml_core.recipes.recipe import Dataset, Recipe, read_recipe, recipe_names

__all__ = ["Dataset", "Recipe", "export_model", "make", "read_recipe", "recipe_names"]
