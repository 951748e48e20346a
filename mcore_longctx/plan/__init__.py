"""What a run will cost before it is booked: memory, time, layouts that fit, evaluation, serving. No torch, no GPU.

One direction: hardware + setup -> memory, step_time -> layouts -> what is printed. Every number comes with the formula that made it.
"""
