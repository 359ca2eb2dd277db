// Drives Chromium by its debugging pipe: node browser.mjs CHROMIUM KEY URL, KEY being the edge's. It
// opens the page, says "open" and then each title that the page gives itself and what it writes to its
// console, one a line, until it is ended.
import { spawn } from 'node:child_process'

const [program, key, url] = process.argv.slice(2)
const browser = spawn(
  program,
  [
    '--headless=new',
    '--no-sandbox',
    '--disable-gpu',
    '--disable-dev-shm-usage',
    '--disable-background-networking',
    '--disable-component-update',
    '--disable-extensions',
    '--disable-sync',
    '--no-first-run',
    '--no-proxy-server',
    `--user-data-dir=${process.env.HOME}/browser`,
    `--ignore-certificate-errors-spki-list=${key}`,
    '--host-resolver-rules=MAP * 127.0.0.1',
    '--remote-debugging-pipe',
  ],
  { stdio: ['ignore', 'inherit', 'inherit', 'pipe', 'pipe'] },
)
browser.on('exit', (code) => process.exit(code ?? 1))

const [, , , to, from] = browser.stdio
let number = 0
const waiting = new Map()
function call(method, params = {}, sessionId) {
  number += 1
  to.write(JSON.stringify({ id: number, method, params, sessionId }) + '\0')
  return new Promise((resolve, reject) => waiting.set(number, { resolve, reject, method }))
}

function arrived(message) {
  const { id, error, result, method, params } = message
  const call = waiting.get(id)
  waiting.delete(id)
  if (call && error) call.reject(new Error(`${call.method}: ${error.message}`))
  else if (call) call.resolve(result)
  else if (method === 'Runtime.bindingCalled') console.log(params.payload)
  else if (method === 'Runtime.consoleAPICalled')
    console.log(params.args.map((argument) => argument.value).join(' '))
  else if (method === 'Runtime.exceptionThrown') console.error(JSON.stringify(params.exceptionDetails))
}

let rest = ''
from.setEncoding('utf8')
from.on('data', (data) => {
  const messages = (rest + data).split('\0')
  rest = messages.pop()
  for (const message of messages) arrived(JSON.parse(message))
})

const { targetId } = await call('Target.createTarget', { url: 'about:blank' })
const { sessionId } = await call('Target.attachToTarget', { targetId, flatten: true })
await call('Runtime.enable', {}, sessionId)
await call('Page.enable', {}, sessionId)
await call('Runtime.addBinding', { name: 'sayTitle' }, sessionId)
await call(
  'Page.addScriptToEvaluateOnNewDocument',
  {
    source: `addEventListener('DOMContentLoaded', () => {
      let last = ''
      const say = () => {
        if (document.title !== last) sayTitle((last = document.title))
      }
      new MutationObserver(say).observe(document, { subtree: true, childList: true, characterData: true })
      say()
    })`,
  },
  sessionId,
)
const { errorText } = await call('Page.navigate', { url }, sessionId)
console.log(errorText ?? 'open')
