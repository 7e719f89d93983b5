. /tmp/env.sh
cd /tmp/proto
python which.py vit "deep,0,1e-4,0.5" "all,0.5,1e-4,0.5" "deep,0,3e-4,0.5" "all,0.3,1e-4,0.1" > vitB.log 2>&1
