#!/usr/bin/env bash
# lightning 2.6.6, torchmetrics 1.9.0: if transformers is installed beside Lightning, every `import lightning` imports
# it too, through torchmetrics, although nothing uses it: each rank of each run starts so much later.
# Expected: an optional package is imported when it is used.
# Seen:
#   without transformers: 0 of its modules imported
#   with transformers 5.24.0: 48 of its modules imported by `import lightning`
. "$(dirname "$0")/common.sh"
count() {
  timeout 300 "$python" -c '
import sys
import lightning.pytorch
print(sum(name.split(".")[0] == "transformers" for name in sys.modules))' 2>/dev/null
}
install torch==2.13.0 lightning==2.6.6 torchmetrics==1.9.0 numpy==2.4.6 setuptools==80.9.0
without=$(count)
echo "without transformers: $without of its modules imported"
"$python" -m pip install --quiet --quiet --disable-pip-version-check --no-compile transformers==5.24.0
with=$(count)
echo "with transformers 5.24.0: $with of its modules imported by \`import lightning\`"
[ "$without" = 0 ] && [ "$with" -gt 0 ]
