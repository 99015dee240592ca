"""Dataset rows of NeMo Gym environments, and the order in which a run draws them. numpy and msgspec only."""
