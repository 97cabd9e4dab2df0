"""
How much sooner does our recipe reach the result of llama2.c's recipe after ten minutes? The sprint
gets a thirtieth of the time. One seed takes 22 minutes on two cores.
"""

title = "Bits per byte against time"
base = ""
runs = """
plain: config/plain_llama2c.py --max_minutes=10 --eval_interval=50
ours: config/speedrun_cpu.py --max_minutes=10 --eval_interval=125
sprint: config/sprint_cpu.py --max_minutes=0.3333 --eval_interval=1000000
"""
evals = 0  # the rows set eval_interval
eval_windows = 2000  # or all of a shorter validation text
