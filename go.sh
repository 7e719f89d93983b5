. /tmp/env.sh
cd /tmp/proto
python which.py vit "half,0,1e-4,0.5" "all,0.5,1e-4,0.1" "half,0,3e-4,0.5"  "half+nodec,0,1e-4,0.5" "all,0.5,3e-4,0.5" > vitA.log 2>&1
