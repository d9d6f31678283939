// The load of bench/locustfile.py for k6: ten /recommend over three contexts to one /recommend/batch of ten ids, users by a Zipf law.
//
//     k6 run -e HOST=http://127.0.0.1:7401 -e GMCO_USERS=300 --vus 50 --duration 30s bench/k6.js
//
// Several nodes: -e GMCO_HOSTS=http://a:7401,http://b:7401

import http from "k6/http";
import { check } from "k6";

const hosts = (__ENV.GMCO_HOSTS || __ENV.HOST || "http://127.0.0.1:7401").split(",");
const users = Number(__ENV.GMCO_USERS || 300);
// Items that were recommended of late to this virtual user.
const seen = [];
const exponent = Number(__ENV.GMCO_ZIPF || 1.1);
const contexts = ["homepage", "video_page", "search_results"];

export const options = {
  thresholds: { http_req_failed: ["rate<0.001"], http_req_duration: ["p(99)<100"], checks: ["rate>0.999"] },
};

// The n-th most frequent user asks in proportion to 1 / n^exponent.
const cumulated = [];
for (let rank = 1, total = 0; rank <= users; rank++) {
  total += Math.pow(rank, -exponent);
  cumulated.push(total);
}

function user() {
  const wanted = Math.random() * cumulated[users - 1];
  let low = 0;
  let high = users - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (cumulated[middle] < wanted) low = middle + 1;
    else high = middle;
  }
  return low + 1;
}

function whole(response) {
  if (response.status !== 200) return false;
  const coverage = response.json("coverage");
  return coverage.answered === coverage.total;
}

export default function () {
  const host = hosts[__VU % hosts.length];
  let response;
  if (seen.length < 10 || Math.random() * 11 < 10) {
    const context = contexts[Math.floor(Math.random() * contexts.length)];
    response = http.get(`${host}/recommend?user_id=${user()}&k=10&context=${context}`, {
      tags: { name: `/recommend ${context}` },
    });
    if (response.status === 200) seen.push(...response.json("hits").map((hit) => hit.media_id));
    seen.splice(0, Math.max(0, seen.length - 1000));
  } else {
    const start = Math.floor(Math.random() * (seen.length - 9));
    const ids = seen.slice(start, start + 10);
    response = http.post(
      `${host}/recommend/batch`,
      JSON.stringify({ user_id: user(), media_ids: ids }),
      { headers: { "Content-Type": "application/json" } },
    );
  }
  check(response, { "whole answer": whole });
}
