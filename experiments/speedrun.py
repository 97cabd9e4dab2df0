"""
How much faster our recipe reaches what llama2.c's has after ten minutes: on two cores, 22 minutes
for each seed. The sprint gets a thirtieth of the time.
"""

title = "Bits per byte against time"
base = ""
runs = """
plain: config/plain_llama2c.py --max_minutes=10 --eval_interval=50
ours: config/speedrun_cpu.py --max_minutes=10 --eval_interval=125
sprint: config/sprint_cpu.py --max_minutes=0.3333 --eval_interval=1000000
"""
evals = 0  # as the rows say
eval_windows = 2000  # the whole of a shorter validation text
