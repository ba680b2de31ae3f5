"""The stages of a run, one file a kind with what it needs beside it.

select.py          places windows and softmax layers under a budget of state, and keeps the result
select_plan.py     what is asked, checked before anything is loaded
select_measure.py  what each layer loses with each window
select_place.py    the greedy rule
finetune_lengths.py  what stage 2 trains on: longer sequences, several lengths, states from before
"""
