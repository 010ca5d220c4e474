"""How decisions are carried out: masked (differentiable) or skipping (fast). It never knows who
decided.
"""
