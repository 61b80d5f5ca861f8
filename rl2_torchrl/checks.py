"""stand-in"""
def check_training(*a, **k): return None
