"""Several checkpoints in one command: ``foldexport A.pth B.pth FOLDER --to onnx --jobs 2``.

    paths ─ find ─▶ checkpoints ─ plan ─▶ tasks, or a refusal before any work
          ─ pool ─▶ one process per checkpoint, each running the command line of that checkpoint alone (worker)
          ─ result ─▶ what each came to, and the exit code of the worst

Nothing here imports torch; the processes do.
"""
