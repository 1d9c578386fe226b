"""The papers' experiments, one module each: ``python -m benchmarks.experiments NAME``.

A module asks one question of many runs and has four names that ``study.conduct`` uses:

* ``SEEDS``: how many seeds, unless the command line says otherwise;
* ``settings(rows, seeds, smoke)``: every run wanted, given the rows known so far, so that a later stage may depend on
  an earlier one (the runs at tuned values follow the tuning runs);
* ``run(setting, device)``: one run, plain values in, plain values out;
* ``report(rows, folder)``: figures into the folder, tables as Markdown.
"""
