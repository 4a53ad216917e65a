"""`audit`: find out what a trainer would learn from a dataset.

    from sstoken.stages.auditing.run import audit

    result = audit("runs/masked")              # a folder of a run, data files, or a dataset in memory
    result = audit("data.jsonl", model="Qwen/Qwen3-0.6B")    # raw conversations
    for finding in result.findings:            # most severe first
        print(finding.severity, finding.kind, finding.rows, finding.what, finding.remedy)
        if finding.example is not None:
            print(finding.example.where, finding.example.text())

`result.facts` holds counts over the dataset, `result.to_dict()` everything ready for JSON. `checks/` has a file for
each family of checks, and docs/audit.md lists them.
"""
