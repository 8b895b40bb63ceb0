"""The engine: the model as users meet it, and the runner that batches its sequences."""
